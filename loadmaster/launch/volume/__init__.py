"""What goes up to a network volume and what comes home from it, through the provider's S3 API (bucket.py)."""

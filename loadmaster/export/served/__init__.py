"""What a real server says of an export: `loadmaster serve-check` (check.py) and tasks of lm-evaluation-harness."""

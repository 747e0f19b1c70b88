"""loadmaster: fine-tune a language model on rented GPUs and hand it to an inference endpoint."""

__version__ = "0.1.0"

"""A Llama, quantised, with adapters."""

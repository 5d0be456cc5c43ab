"""Files: atomic writes, records, tensors, hashes."""

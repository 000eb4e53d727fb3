"""Other libraries, each thin."""

"""What is written: names, shapes, shards, manifest, verification, model card."""

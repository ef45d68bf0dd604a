"""Programs that build data sets on disk: a folder of images with metadata.jsonl."""

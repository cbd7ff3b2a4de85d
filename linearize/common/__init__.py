"""What has no subject of its own: files, text, running a model quietly."""

"""Files: atomic writes, JSON with a checksum, hashes, and limits on what files from strangers declare."""

"""Runs in a bucket: staged in a folder of this machine, which is all that training knows, fetched and uploaded."""

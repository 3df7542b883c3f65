"""Tables of attacks and methods over seeds, made by one command: what is missing is prepared, crafted and trained."""

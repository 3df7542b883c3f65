"""What the `dbd` command does, one file a subcommand."""

"""The command line: what each subcommand prints."""

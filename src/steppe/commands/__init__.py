"""The command line: each subcommand parses, calls one public function and prints."""

"""The command line: schema, building objects from configuration, and the console script."""

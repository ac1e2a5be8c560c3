"""Other libraries' interfaces, each by a module of its own that imports its library when it is first used."""

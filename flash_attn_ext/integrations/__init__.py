"""Our attention inside other packages. Nothing is imported or changed here: each module is asked for by name."""

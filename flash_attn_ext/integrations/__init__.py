"""Ways into models and tools that exist already; importing one changes nothing, each has a function that does."""

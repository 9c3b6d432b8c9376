"""Products for CPUs, compiled once on each machine by its own C++ compiler: `library` builds them, `panels` calls them."""

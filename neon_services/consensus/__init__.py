"""The consensus of safekeepers and walproposer as pure state machines: no sockets, files or clocks."""

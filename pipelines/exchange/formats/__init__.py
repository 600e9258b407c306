"""The formats, one a file: a module with a `FORMAT`. What lies here is offered."""

"""The views of the page, one a file: a module with a `VIEW`. What lies here is shown."""

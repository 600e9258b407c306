"""In: a command line. Out: one configuration, one stage called, its result printed."""

"""From a command line to one configuration, one stage called, its result printed."""

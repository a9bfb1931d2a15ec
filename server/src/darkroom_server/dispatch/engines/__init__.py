"""The engines that the dispatcher feeds: restarts, choice, and what each one holds."""

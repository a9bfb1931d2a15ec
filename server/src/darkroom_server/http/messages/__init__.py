"""Between JSON and the plain requests and results of the service layer."""

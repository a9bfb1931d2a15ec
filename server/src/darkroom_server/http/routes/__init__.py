"""The routes: what each path of the HTTP door answers."""

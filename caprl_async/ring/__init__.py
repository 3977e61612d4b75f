"""Places, watches and restarts every actor of the ring; knows no loss and no format."""

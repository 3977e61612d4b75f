"""The hub of the ring: admission, leases, staleness, the ledger and the transport."""

"""The terminal client `trimtab chat`. It speaks to a server over HTTP and imports nothing else of it."""

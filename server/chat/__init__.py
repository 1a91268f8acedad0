"""The terminal client `trimtab chat`. It uses a server over HTTP and imports nothing else of it."""

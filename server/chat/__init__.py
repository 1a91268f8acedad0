"""The clients of a running server: `trimtab chat` and `trimtab profiles`. They use it over HTTP and import nothing else
of it."""

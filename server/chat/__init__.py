"""The clients of a running server: `trimtab chat`, `profiles` and `jobs`. They use it over HTTP and import nothing else
of it."""

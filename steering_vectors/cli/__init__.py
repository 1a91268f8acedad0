"""The offline commands of `trimtab`. Model code is imported when a command runs."""

"""The offline commands of `trimtab`, one file each. They import model code only when a command runs."""

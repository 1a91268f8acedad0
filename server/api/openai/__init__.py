"""The routes of OpenAI's form."""

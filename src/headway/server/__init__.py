"""The OpenAI API over HTTP. ``run`` serves one; the rest is one file per family of endpoints."""

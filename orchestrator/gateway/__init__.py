"""The OpenAI front door: vLLM's own app over our engine client, with dispatch inside."""

"""The adapter from the engine port to vLLM; the only vLLM imports below the gateway."""

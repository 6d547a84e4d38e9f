"""One vLLM engine in a Ray actor: its step loop, its agent, its reports and token frames."""

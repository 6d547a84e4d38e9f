"""Production's policies, protocol machines and shells in virtual time, over engines that know only lengths."""

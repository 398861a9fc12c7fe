"""The parts of the contract with SGLang, a file for each."""

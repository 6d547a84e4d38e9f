"""What several kinds of tests share: fakes of the world around us, never mocks of our own classes."""

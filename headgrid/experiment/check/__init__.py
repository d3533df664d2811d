"""Does a result hold? Every figure of a run made again from its journal, and gates of physics for anyone's figures."""

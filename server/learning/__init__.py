"""Learning from feedback: a better version of a profile from what people said, with proof and a way back. It runs
beside servers, never inside one: it reads their feedback database and changes their profile directory."""

"""The bucket of the tests' S3 server, and the key that no message may show."""

BUCKET, SECRET = "groups", "a-secret-key-of-this-test"

"""The ops, a file each: the public function, its checks, its schema, its fake, its autograd, in that order."""

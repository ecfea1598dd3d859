-- Key: the stream. Arguments: time to live, whether what was told is kept, of which runs something is missing.
return restart(KEYS[1], ARGV[1], ARGV[2] == '1', ARGV[3])

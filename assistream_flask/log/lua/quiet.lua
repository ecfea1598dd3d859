-- Keys: the locks, the stream. Arguments: the thread, the stream's time to live. Gives where it ends.
if redis.call('ZSCORE', KEYS[1], ARGV[1]) then return '' end
local epoch, offset = last(KEYS[2])
if not epoch then epoch, offset = restart(KEYS[2], ARGV[2]), '0' end
return epoch .. '-' .. offset

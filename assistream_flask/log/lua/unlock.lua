-- Keys: the locks, the stream. Arguments: the thread, the lock as it was taken, the stream's time to live.
-- Who lost the lock may have told what others had already, or in another order than the store's.
if tonumber(redis.call('ZSCORE', KEYS[1], ARGV[1]) or '0') == tonumber(ARGV[2]) then
    redis.call('ZREM', KEYS[1], ARGV[1])
else
    restart(KEYS[2], ARGV[3], true)
end

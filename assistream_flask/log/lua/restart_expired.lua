-- Key: the locks. Arguments: what the streams' keys begin with, their time to live.
-- Who holds a lock that ran out may have stored what it told nobody.
for _, thread in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now(), 'LIMIT', 0, 100)) do
    restart(ARGV[1] .. thread, ARGV[2], true)
    redis.call('ZREM', KEYS[1], thread)
end

-- Keys: the locks, the stream. Arguments: the thread, the lock's and the stream's time to live.
local at, held = now(), redis.call('ZSCORE', KEYS[1], ARGV[1])
if held then
    if tonumber(held) > at then return '' end
    restart(KEYS[2], ARGV[3], true)
end
local mine = string.format('%.0f', at + tonumber(ARGV[2]))
redis.call('ZADD', KEYS[1], mine, ARGV[1])
return mine

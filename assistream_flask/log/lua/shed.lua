-- Key: what the streams' keys begin with. Arguments: their time to live, most bytes of all.
-- A full Redis lets a script go on that has deleted.
redis.call('DEL', KEYS[1] .. 'none')
local _, used = accounts(KEYS[1])
local expired = string.format('%.0f', math.floor(now() / 1000) - ARGV[1])
local found = redis.call('ZRANGEBYSCORE', used, '-inf', expired, 'WITHSCORES', 'LIMIT', 0, 200)
for n = 1, #found, 2 do
    visit(found[n], tonumber(found[n + 1]), ARGV[1])
end
shed(KEYS[1], tonumber(ARGV[2]), ARGV[1], 500)

-- Keys: the stream. Arguments: time to live, the last event, how long other streams live. One that was there leaves no
-- byte of it in the new stream. In a full Redis too, as a script may go on that has deleted. A message of no event says
-- where the stream begins now.
local key, epoch, offset, gone = KEYS[1], last(KEYS[1])
if gone then return end
if not epoch then epoch, offset = restart(key, ARGV[1]), 0 end
local place = epoch .. '-' .. string.format('%.0f', offset + 1)
redis.call('DEL', key)
redis.call('DEL', key .. ':past')
redis.call('XADD', key, place, 'e', ARGV[2], 'gone', '')
redis.call('PEXPIRE', key, ARGV[1])
measure(key)
-- So that it leaves the accounts when it expires, and not later.
local _, used = accounts(key)
redis.call('ZADD', used, math.floor(now() / 1000) + ARGV[1] - ARGV[3], key)
redis.call('PUBLISH', key, place .. '\n' .. ARGV[2])
redis.call('PUBLISH', key, place .. '\n')

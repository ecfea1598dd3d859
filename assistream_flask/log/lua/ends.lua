-- Keys: streams. Argument: time to live. Gives where each ends.
local found = {}
for i, key in ipairs(KEYS) do
    local epoch, offset, gone = last(key)
    if not epoch then epoch, offset = restart(key, ARGV[1]), '0' end
    if not gone then redis.call('PEXPIRE', key, ARGV[1]) end
    found[i] = epoch .. '-' .. offset
end
return found
